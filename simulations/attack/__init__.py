"""How leaky a run's training is: attacks on a simulated site that is trained as the run trains."""
