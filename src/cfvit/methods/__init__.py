"""What can be trained, scored, timed and compared by one harness: a file for each method and its variants."""
