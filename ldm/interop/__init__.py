"""Models as other libraries hold them."""
