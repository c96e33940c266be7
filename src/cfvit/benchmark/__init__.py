"""Speed beside the plain backbone and beside other ways of saving, in one process and in turn."""
