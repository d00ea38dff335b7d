"""Public measures of matrices: leading singular triples, spectra of products, concentration."""

from hf_stable.measures.spectral import (
    RowShard,
    SingularTriple,
    as_matrix,
    generic_vector,
    leading_triple,
    matrix_blocks,
    ov_singular_values,
    power_step,
    qk_singular_values,
    spectral_dtype,
    spectral_energy_concentration,
    spectral_energy_curve,
    split_blocks,
    stable_rank,
)

__all__ = [
    "RowShard",
    "SingularTriple",
    "as_matrix",
    "generic_vector",
    "leading_triple",
    "matrix_blocks",
    "ov_singular_values",
    "power_step",
    "qk_singular_values",
    "spectral_dtype",
    "spectral_energy_concentration",
    "spectral_energy_curve",
    "split_blocks",
    "stable_rank",
]
