"""Which plugins are here, what they offer and answer, and whose fault an error is."""
