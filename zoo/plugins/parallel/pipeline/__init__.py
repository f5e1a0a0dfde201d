"""Pipeline parallelism over `pp`."""
