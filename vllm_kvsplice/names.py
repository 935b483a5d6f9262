"""Names of calibration's choices, apart from all that loads torch: the command line knows them without waiting for it."""

from typing import Literal

# Fitting algorithms: each has a line in `calibration.fit.FITS`.
FitName = Literal["pca", "pca_spline", "pca_uniform", "kvsplice", "kvsplice_spline", "kvsplice_uniform"]
# Who decides on bits: each has a place in `calibration.planners.make_plan`.
PlannerName = Literal["budget", "tiers", "uniform", "manual"]
