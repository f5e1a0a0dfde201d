"""What was asked for: every setting of a job, its flags, its ranges."""
