"""A search space becomes a Ray Tune run of Ray Train runs."""
