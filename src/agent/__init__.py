"""The worker's side: the one program that may talk to a worker's engine, and the client by which a job asks it."""
