"""The schedulers of diffusers by the names of our samplers."""

import references

SCHEDULERS = references.schedulers()
