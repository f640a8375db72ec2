"""How the zoo's models were trained: scripts, logs and notes. Nothing here is needed to use them."""
