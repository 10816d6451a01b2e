"""What a clip, a pair of clips, or a set of them comes to."""
