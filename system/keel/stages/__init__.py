"""The stages around online training, on the same learner gang, Arrow rows and metrics."""
