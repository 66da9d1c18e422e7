"""`python -m ctrl_ray.compare --label-budgets`: how near the methods come to the target with so many labelled images."""
