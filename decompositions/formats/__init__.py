"""What a network is: the base class, plans, gauges and one file a format."""
