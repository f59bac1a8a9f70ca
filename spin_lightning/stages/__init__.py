"""What can be trained, one file each, and what the stages share."""
