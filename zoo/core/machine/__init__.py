"""What this machine is: devices, memory, and what a launcher says of its ranks."""
