"""The second witness: where a problem is Gaussian, two solvers that share nothing but the chain must give one answer."""

from __future__ import annotations

from ctrl_ray.errors import ConfigError
from ctrl_ray.exact.gaussian import is_gaussian, solve_gaussian
from ctrl_ray.exact.grid import Solution
from ctrl_ray.exact.problems import Problem

MOMENT_TOLERANCE = 0.005
"""Of means and standard deviations: half the smallest bar that a training is judged by."""
NATS_TOLERANCE, NATS_RELATIVE_TOLERANCE = 0.01, 0.002
"""Of KL, objective and log Z: the sum of both, the second times the value."""


def check_against_riccati(problem: Problem, coordinate: int, solution: Solution, *, controlled_from: int = 0) -> bool:
    """Compare the grid's answers for one coordinate with the Riccati recursion's; False where that has none.

    Raises ConfigError where they differ by more than the tolerances: the grid's bins are too coarse for the problem, and
    what a training reached must not be compared with its answer.
    """
    if not is_gaussian(problem, coordinate):
        return False
    closed = solve_gaussian(problem, coordinate, controlled_from=controlled_from)
    pairs = [("log Z", solution.log_z, closed.tilt.objective)]
    for law in ("base", "tilt", "optimum"):
        on_grid, exact = getattr(solution, law), getattr(closed, law)
        pairs += [
            (f"{law} {name}", getattr(on_grid, name), getattr(exact, name))
            for name in ("mean", "std", "kl", "objective")
        ]
    for name, on_grid, exact in pairs:
        is_moment = name.endswith(("mean", "std"))
        allowed = MOMENT_TOLERANCE if is_moment else NATS_TOLERANCE + NATS_RELATIVE_TOLERANCE * abs(exact)
        if not abs(on_grid - exact) <= allowed:
            raise ConfigError(
                f"problem {problem.name}, coordinate {coordinate}: the two exact solvers disagree on the {name}: {on_grid:.4f} "
                f"on a grid of {len(solution.grid.centres)} bins of {solution.grid.width:.4g}, {exact:.4f} by the Riccati "
                f"recursion, where {allowed:.4f} is allowed; the bins are too coarse for this problem: give a wider reward, "
                "fewer denoising steps, or data nearer to 0"
            )
    return True
