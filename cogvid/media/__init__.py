"""Pictures, videos and text from outside, and videos to files."""
