"""What a browser shows: the page of `cogvid ui`, and reports."""
