"""Many simulated hospitals on one machine, with the same server and client code."""
