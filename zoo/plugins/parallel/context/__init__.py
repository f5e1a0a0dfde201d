"""Context parallelism over `cp`: rows cut over ranks, with a scheme in every attention seam."""
