# What a registry by that name takes, and a container runtime without Kubernetes.
set -eu
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=registry.example \
    -addext subjectAltName=DNS:registry.example -keyout registry.key -out registry.pem
mkdir -p /etc/containers/certs.d/registry.example
cp registry.pem /etc/containers/certs.d/registry.example/ca.crt
cat > registry.yaml << 'END'
version: 0.1
storage: {filesystem: {rootdirectory: /var/lib/registry}}
http: {addr: "127.0.0.1:443", tls: {certificate: registry.pem, key: registry.key}}
END
echo 'disabled_plugins = ["io.containerd.grpc.v1.cri"]' > containerd.toml
set +eu
