"""jacnorm: seven papers about the input-output Jacobian of deep networks, reproduced by one DAG."""
