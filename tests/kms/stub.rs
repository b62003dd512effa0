//! A TLS server in a test's hand. It says one thing to everybody, for replies that no real server can be brought to give, or stands
//! in front of a real one and spoils what that says.

use std::io::{Read, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned};
use tempfile::TempDir;

use super::openbao::{Server, make_certificates};

/// Serves until the test's process ends.
pub(crate) struct Stub {
    pub(crate) dir: TempDir,
    pub(crate) address: String,
}

impl Stub {
    /// Says `reply`, headers and all, to every request, and closes the connection.
    pub(crate) fn start(reply: Vec<u8>) -> Self {
        Self::answering(move |_| reply.clone())
    }

    /// Says what `answer` makes of each request (its bytes, as they came), and closes the connection.
    pub(crate) fn answering(answer: impl Fn(&[u8]) -> Vec<u8> + Send + Sync + 'static) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = TempDir::with_prefix("lethefs-stub.").expect("temporary directory");
        make_certificates(dir.path());
        let chain = CertificateDer::pem_file_iter(dir.path().join("srv.pem"))
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .expect("certificate");
        let key = PrivateKeyDer::from_pem_file(dir.path().join("srv.key")).expect("key");
        let config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).expect("configuration");
        let (config, answer) = (Arc::new(config), Arc::new(answer));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("port");
        let address = format!("https://{}", listener.local_addr().expect("address"));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (config, answer) = (config.clone(), answer.clone());
                thread::spawn(move || {
                    let connection = ServerConnection::new(config).expect("connection");
                    let mut stream = StreamOwned::new(connection, stream);
                    let Some(request) = read_request(&mut stream) else { return };
                    // The client may have closed its end already: it is what is tested.
                    let _ = stream.write_all(&answer(&request));
                    stream.conn.send_close_notify();
                    let _ = stream.flush();
                    // Not before the client has had it all: closing with unread input would reset the connection.
                    let _ = stream.read_to_end(&mut Vec::new());
                });
            }
        });
        Self { dir, address }
    }

    /// Passes requests on to a real server, and gives back its replies, each closing its connection, as `spoil` leaves them.
    pub(crate) fn before(server: &Server, spoil: impl Fn(Vec<u8>) -> Vec<u8> + Send + Sync + 'static) -> Self {
        let (port, ca) = (server.port(), server.ca());
        Self::answering(move |request| spoil(ask(port, &ca, request)))
    }
}

/// Up to the end of its body; `None`: the client went away.
fn read_request(stream: &mut impl Read) -> Option<Vec<u8>> {
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).ok()?;
        request.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&request).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    stream.read_exact(&mut body).ok()?;
    request.extend(body);
    Some(request)
}

/// The whole reply of the server at this port, as its bytes came.
fn ask(port: u16, ca: &Path, request: &[u8]) -> Vec<u8> {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_file_iter(ca).expect("CA") {
        roots.add(root.expect("CA")).expect("CA");
    }
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let name = ServerName::IpAddress(IpAddr::from(Ipv4Addr::LOCALHOST).into());
    let connection = ClientConnection::new(Arc::new(config), name).expect("connection");
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("the real server");
    let mut stream = StreamOwned::new(connection, stream);
    // One request for each connection, so that the reply ends with it.
    let line = request.windows(2).position(|two| two == b"\r\n").expect("a request line") + 2;
    let mut sent = request[..line].to_vec();
    sent.extend_from_slice(b"Connection: close\r\n");
    sent.extend_from_slice(&request[line..]);
    stream.write_all(&sent).expect("asked");
    let mut reply = Vec::new();
    let _ = stream.read_to_end(&mut reply);
    assert!(!reply.is_empty(), "the real server says nothing");
    reply
}
