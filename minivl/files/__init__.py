"""Released files: found or downloaded (find), read and checked (formats), loaded into the model (load)."""
