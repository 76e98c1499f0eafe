"""Which files there are and which rows they give: corpus.yaml, listings, batches, labels, splits, trainset. No
torch.
"""
