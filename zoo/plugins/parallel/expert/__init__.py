"""Expert parallelism over `ep`."""
