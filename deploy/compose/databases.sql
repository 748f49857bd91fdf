-- One database and one role each for Dagster's storage, MLflow's, and what the project itself keeps
-- (prediction log, Feast's registry). Nobody reads another's. The image runs it when it sets up an
-- empty data directory; for a server that is there already: psql --file databases.sql.
\set ON_ERROR_STOP on
\getenv dagster_password DAGSTER_DB_PASSWORD
\getenv mlflow_password MLFLOW_DB_PASSWORD
\getenv churn_password CHURN_DB_PASSWORD

CREATE ROLE dagster LOGIN PASSWORD :'dagster_password';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
CREATE ROLE churn LOGIN PASSWORD :'churn_password';

CREATE DATABASE dagster OWNER dagster;
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE churn OWNER churn;

REVOKE ALL ON DATABASE dagster, mlflow, churn FROM PUBLIC;
