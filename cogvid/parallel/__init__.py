"""One video on several devices: which processes work together, and what each of them has of a step."""
