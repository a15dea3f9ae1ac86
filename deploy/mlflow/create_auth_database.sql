-- Run by PostgreSQL when its volume is empty. MLflow's users need a database of their own: both schemas use the same table for their version.
CREATE DATABASE mlflow_auth OWNER mlflow;
