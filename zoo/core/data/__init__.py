"""From files to rows: corpora, samples, packing, batches."""
