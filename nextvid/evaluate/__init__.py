"""What a run's encoder is worth: attentive probes and k-NN on frozen features, and generated next frames."""
