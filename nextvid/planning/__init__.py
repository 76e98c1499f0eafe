"""What a batch still needs, what that costs, and which configuration is accepted. `nextvid plan` and the sensor ask."""
