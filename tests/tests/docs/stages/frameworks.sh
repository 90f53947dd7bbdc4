# As if Ray and Dask were installed, and the package with them. Variables: SHAPER_PYTHON.
set -eu
ln -s "$(dirname "$SHAPER_PYTHON")/ray" "$(dirname "$SHAPER_PYTHON")/dask" /run/bin
echo '127.0.0.1 scheduler' >> /etc/hosts
export RAY_USAGE_STATS_ENABLED=0 RAY_TMPDIR=/run/ray
set +eu
