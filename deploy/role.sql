-- The server's role and database, made by the superuser when the catalogue is made; the password is in a file.
\set password `cat "$ROLE_PASSWORD_FILE"`
CREATE ROLE loraweave LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION PASSWORD :'password';
CREATE DATABASE loraweave OWNER loraweave;
REVOKE ALL ON DATABASE loraweave FROM PUBLIC;
\connect loraweave
-- which only a superuser may
CREATE EXTENSION vector;
