"""What is secret in URLs, and where one ends in a text."""

import pytest

from fedjax_sim.core import urls

SECRET = {
  # What a user writes -> what is shown.
  "http://me:hunter2@host:5000": "http://***@host:5000",
  "https://hunter2@host": "https://***@host",
  "HTTP://me:hunter2@host": "HTTP://***@host",
  "http://me:hunter2/@x@host/path": "http://***@host/path",
  "http://me:a://hunter2@host": "http://***@host",
  "http:///me:hunter2@host": "http:///***@host",
  "ftp:/me:hunter2@host/x.npz": "ftp:/***@host/x.npz",  # as a path has it
  "mysql://me:12/hunter2@host": "mysql://***@host",
  "mysql://me:hunter 2@host/db": "mysql://***@host/db",
  "postgresql://me:hun'ter2@host/db": "postgresql://***@host/db",
  'http://me:hun"ter2@host': "http://***@host",
  "http://me:hun<ter2@host": "http://***@host",
  "s3://key:hunter2/+@bucket/run": "s3://***@bucket/run",
  "filecache::s3://key:hunter2@bucket": "filecache::s3://***@bucket",
  "sqlite+pysqlcipher://:hunter2@/a.db": "sqlite+pysqlcipher://***@/a.db",
  "http://host/?sig=hunter2": "http://host/?sig=***",
  "http://host/?access_key=hunter2&x=1": "http://host/?access_key=***&x=1",
  "https://host/?x=1&X-Amz-Signature=hunter2": (
    "https://host/?x=1&X-Amz-Signature=***"
  ),
  "http://host/#token=hunter2": "http://host/#token=***",
  "http://host/?x=1#token=hunter2": "http://host/?x=1#token=***",
  "http://host;password=hunter2": "http://host;password=***",
  "http://host/?pass%77ord=hunter2": "http://host/?pass%77ord=***",
  "http://host/?to=http%3A%2F%2Fme%3Ahunter2%40b": "http://host/?to=***",
  "postgresql:///db?user=me&password=hunter 2": (
    "postgresql:///db?user=***&password=***"
  ),
  # Of a database's arguments, what is not known to be harmless.
  "mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dhunter2": (
    "mssql+pyodbc:///?odbc_connect=***"
  ),
  "postgresql://host/db?sslmode=require&other=hunter2": (
    "postgresql://host/db?sslmode=require&other=***"
  ),
  "Driver=x;UID=me;PWD=hunter2;x=1": "Driver=x;UID=***;PWD=***;x=1",
}

HARMLESS = [
  "http://host:5000/path",
  "http://[::1]:5000/path",
  "https://host/?project=3&author=me",
  "sqlite:////home/me@work/mlflow.db",
  "sqlite:///C:/me@work/mlflow.db",
  "file:///home/me@work",
  "s3://bucket/run@2",
  "abfs://container@account.dfs.core.windows.net/run",
  "databricks://profile:prefix",
  "arn:aws:sagemaker:us-west-2:1:mlflow-tracking-server/x",
  "postgresql+psycopg2://host/db?sslmode=require&sslkey=a.key",
  "configs/a.py:token",
  "a.token=5 is wrong; give b.key=3 (c.pwd: 1 -> 2).",
  "http://host:5000",
]


@pytest.mark.parametrize("url", [*SECRET])
def test_what_is_secret(url):
  shown = urls.redacted_url(url)
  assert shown == SECRET[url]
  assert urls.redacted_url(shown) == shown


# Of others only their owner knows where they begin and end.
IN_TEXTS = [u for u in SECRET if " " not in u and not u.startswith("Driver")]


@pytest.mark.parametrize("url", IN_TEXTS)
def test_what_is_secret_in_a_text(url):
  for text in ("to '{}' and to {}: no.", "({}), a@b", "--a={} {}?x=y"):
    shown = urls.redacted(text.format(url, url))
    assert "hunter2" not in shown
    assert "ter2" not in shown
  text = "no answer of '{}'; it was {}."
  assert urls.redacted(text.format(url, "http://b:1")) == text.format(
    SECRET[url], "http://b:1"
  )


@pytest.mark.parametrize("url", HARMLESS)
def test_what_is_harmless(url):
  assert urls.redacted_url(url) == url
  assert (
    urls.redacted(f"to '{url}', {url}: no, me") == f"to '{url}', {url}: no, me"
  )


def test_secrets_within_a_value():
  url, shown = "http://me@host", "http://***@host"
  value = {"a": (1, [url, None]), url: {"b": "c", "d": url}}
  assert urls.without_secrets(value) == {
    "a": (1, [shown, None]),
    shown: {"b": "c", "d": shown},
  }
  assert urls.without_secrets(b"http://me@host") == b"http://me@host"
