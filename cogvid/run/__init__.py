"""From the options of a call to a video."""
