"""The page to train and generate in; it calls what main.py and the scripts call."""
