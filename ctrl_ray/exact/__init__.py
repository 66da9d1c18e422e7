"""Problems whose answer is known, and their solvers: numpy and scipy only, independent of everything that trains."""
