"""Text and class encoders: what turns a caption into the UNet's context."""
