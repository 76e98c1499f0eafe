"""Generated next frames: masked and autoregressive."""
