"""What every other room builds on; imports nothing else of the project."""
