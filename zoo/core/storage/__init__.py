"""Files of a checkpoint on disk: checksums, what is finished, what lies beside the weights."""
