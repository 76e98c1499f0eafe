"""When and where assets are made: Dagster definitions, jobs, schedules, sensors, executors."""
