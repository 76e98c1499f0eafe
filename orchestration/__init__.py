"""When and where: instances only. Definitions, jobs, schedules, sensors; no class that makes anything lives here."""
