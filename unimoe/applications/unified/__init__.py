"""One model that answers about an image and draws one, and SparseUnifiedModel's adaptation of its drawing."""
