"""Files of a checkpoint read and written piece by piece, checked, and gone on with after an interruption."""
