"""Every configuration of the project: recipes, corpus.yaml, and the accepted copy of its digested parts."""
