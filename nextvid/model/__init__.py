"""The paper, one file per box of its Fig. 2. torch and einops only; no files, no tables."""
