"""Files to frames and facts: probe, decode, sandbox, shot detection, image quality."""
