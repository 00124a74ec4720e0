"""The same layers on images: `python -m vision.train …`."""
