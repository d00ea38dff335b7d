"""Public measures of matrices: leading singular triples, spectra of products, concentration."""

from hf_stable.measures.leading import leading_triple
from hf_stable.measures.matrices import as_matrix, matrices_of, spectral_dtype
from hf_stable.measures.matrix_shards import MatrixShard
from hf_stable.measures.parts import WHOLE, Parts
from hf_stable.measures.power_iteration import SingularTriple, generic_vector, power_step
from hf_stable.measures.products import (
    ov_singular_values,
    qk_singular_values,
    spectral_energy_concentration,
    spectral_energy_curve,
    stable_rank,
)

__all__ = [
    "WHOLE",
    "MatrixShard",
    "Parts",
    "SingularTriple",
    "as_matrix",
    "generic_vector",
    "leading_triple",
    "matrices_of",
    "ov_singular_values",
    "power_step",
    "qk_singular_values",
    "spectral_dtype",
    "spectral_energy_concentration",
    "spectral_energy_curve",
    "stable_rank",
]
