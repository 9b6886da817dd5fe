"""The workstation half: a trained torch model to an INT8 bundle that can be deployed and validated."""
